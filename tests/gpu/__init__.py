"""What a GPU must compute as a CPU does; the same tests run on both (``-m gpu``, ``-m "not gpu"``).

On a CPU they show that the tests are sound; what needs a launch has no other place to be seen.
``python -m benchmarks.gpu --stage numbers`` runs those of a GPU.
"""
