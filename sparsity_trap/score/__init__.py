"""Score a file of predictions against a section, and write a report card.

python -m sparsity_trap.score predictions.h5ad --section outs --units counts --out card
"""
