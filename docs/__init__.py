"""Pages, and the modules that write some of them: ``python -m docs.build``."""
