"""`python -m dougong` is `dougong`."""

from dougong.cli.main import main

main()
