"""What the project tests itself with, shipped so that plugin authors can do the same."""

from .chain import ChainRunner, alone

__all__ = ["ChainRunner", "alone"]
