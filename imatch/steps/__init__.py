"""The verbs from folder to folder: what the notebooks call; each is a resumable step on disk. See `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
