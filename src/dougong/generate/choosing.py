"""The next token of rows whose requests sample each in its own way; every operation treats its rows one by one."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dougong.generate.request import Row
from dougong.generate.sampling import NOT_FINITE, SamplingConfig, accept, log_probabilities, pick, probabilities

Choice = int | str
"""a chosen token, or why there is none"""


def choose_each(rows: Sequence[Row], logits_NV: Float[Tensor, "N V"], drawn: tuple[int, Tensor] | None = None,
                ) -> list[Choice]:
    """The choice of each row; rows of one kind of sampling are chosen in one go. `drawn`: what a draft drew for the one
    row, and from which law."""
    top_N, best_N = logits_NV.max(-1)
    choices: list[Choice] = list(best_N.tolist())
    kinds: dict[tuple, list[int]] = {}
    changed: dict[int, Tensor] = {}
    for n, (row, finite) in enumerate(zip(rows, top_N.isfinite().tolist())):
        if not finite:
            choices[n] = NOT_FINITE
            continue
        if row.adjusts:
            try:
                changed[n] = row.adjusted(logits_NV[n:n + 1])
            except Exception as error:   # somebody's constraint; the others go on
                choices[n] = f"{type(error).__name__}: {error}"
                continue
        sampling = row.request.sampling
        if sampling.temperature or row.adjusts:
            kind = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            kinds.setdefault(kind, []).append(n)
    for members in kinds.values():
        sampling: SamplingConfig = rows[members[0]].request.sampling
        whole = not changed and len(members) == len(rows)
        x_NV = logits_NV if whole else torch.cat([changed.get(n, logits_NV[n:n + 1]) for n in members])
        if drawn is not None:
            draws = rows[members[0]].draws
            choices[members[0]] = accept(probabilities(x_NV, sampling)[0], drawn[1], drawn[0],
                                         (draws.next(), draws.next()))
            continue
        uniforms = [rows[n].draws.next() for n in members] if sampling.temperature else None
        for n, id in zip(members, pick(x_NV, sampling, uniforms).tolist()):
            choices[n] = id
    return choices


def log_probabilities_of(rows: Sequence[Row], choices: Sequence[Choice], logits_NV: Float[Tensor, "N V"],
                         ) -> dict[int, tuple[float, list[tuple[int, float]]]]:
    """For rows that ask: the log-probability of the choice, and the most likely tokens with theirs."""
    asking: dict[int, list[int]] = {}
    for n, (row, choice) in enumerate(zip(rows, choices)):
        if row.request.sampling.logprobs is not None and isinstance(choice, int):
            asking.setdefault(row.request.sampling.logprobs, []).append(n)
    told = {}
    for count, members in asking.items():
        ids_N = torch.tensor([choices[n] for n in members], device=logits_NV.device)
        told |= zip(members, zip(*log_probabilities(logits_NV[members], ids_N, count)))
    return told
