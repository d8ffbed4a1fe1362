"""The commands of ``t2tvit``: a file for each, with its options, its help and what it runs.

A file imports what it runs only when it runs, so that ``--help`` needs no extra package.
"""

COMMANDS = (
    *("train", "eval", "predict", "compare", "bench", "visualize", "export", "convert", "models"),
)
