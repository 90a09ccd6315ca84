"""Everything that needs a GPU, in stages that fit into half an hour of one.

    python -m benchmarks.gpu --stage numbers --budget 240

A stage is a list of cells. A cell is one measurement; it runs in a process that a crash may kill,
and what came of it, a failure included, is in the stage's JSON before the next cell begins. The
stages are ``numbers.py``, ``steps.py``, ``profile.py`` and ``compile.py``; docs/gpu.md says how to
run them, and ``page.py`` writes that page from what they found.
"""
