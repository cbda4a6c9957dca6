"""imatch: photographs to embeddings, references with exact truth, TopK retrieval and 1:1 matches.

What works in memory is here, what works from folder to folder in `imatch.steps`; `__init__.pyi` lists both. Each name
is imported when it is first used, so that `import imatch` is light.

>>> import imatch
>>> imatch.Resize("long_side", long_side=512).target((600, 1000), patch=16)
(304, 512)
"""

import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"

_COMMANDS = {
    "imatch.batch": "imatch run",
    "imatch.demo": "imatch demo",
    "imatch.doctor": "imatch doctor",
    "imatch.legacy": "imatch import",
    "imatch.registry": "imatch weights",
}
"""What was called by `python -m` before there was a command."""
if sys.argv[:1] == ["-m"]:  # as it is while Python looks for the module that it shall run
    for _old in {*_COMMANDS} & {*sys.orig_argv}:
        print(f"python -m {_old} is `{_COMMANDS[_old]} ...` now: see {_COMMANDS[_old]} --help", file=sys.stderr)
        raise SystemExit(2)
