"""Two machines, as two network namespaces: the cable between them is pulled, and plugged in again."""

import time

import pytest
from ends import RunDirectory, processes, starts, steps_done
from hosts import two_hosts
from teams import Launch
from test_many_processes import alone, largest_difference, still  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PORT = 29400


@pytest.mark.chaos("the cable between two machines (network namespaces) is pulled in the middle of training, and "
                   "plugged in again",
                   must="the first goes on alone, then with the second, by itself; losses within 1e-6 of the "
                        "uninterrupted run's")
def test_cut_off_and_rejoined(lab, still, alone, told):   # noqa: F811
    run = RunDirectory(lab / "cut-off")
    with two_hosts() as (first, second):
        launches = []

        def launch(host, log):
            options = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5", "--monitor-interval=0.2",
                       "--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:{PORT}", "--rdzv-id=cut-off",
                       "--rdzv-conf=last_call_timeout=12,keep_alive_interval=1,keep_alive_max_attempt=3,"
                       f"is_host={int(host is first)}",      # a namespace's address is not that of its host name
                       f"--local-addr={host.address}"]
            launches.append(Launch(lab, options, "train", still, "--run", run.path, "layout.shard=2",
                                   fault="watch_closely:0.5", log=log, prefix=host.prefix,
                                   environment={"GLOO_SOCKET_IFNAME": host.card,
                                                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))     # see torchrun.sh
            return launches[-1]

        try:
            staying = launch(first, "first-host")
            time.sleep(1)       # the rendezvous lives on the first machine
            leaving = launch(second, "second-host")
            staying.wait_until(lambda: steps_done(run) >= 7)
            assert processes(run) == [2], "they did not begin together"

            second.pull_the_cable()
            staying.wait_until(lambda: processes(run)[-1] == 1 and steps_done(run) >= 14)
            leaving.kill()      # or it ends by itself when it has waited long enough for the rendezvous
            alone_until = steps_done(run)

            second.plug_it_in()
            launch(second, "second-host-again")
            staying.wait_until(lambda: processes(run)[-1] == 2)
            assert staying.end() == 0, staying.said()[-3000:]
        finally:
            for one in launches:
                one.kill()
    difference = largest_difference(run, alone)
    assert difference < 1e-6
    told(f"processes of each attempt: {processes(run)}, which began at steps {starts(run)}; alone until step "
         f"{alone_until}; losses differ by at most {difference:.1e} relative from those of one process")

