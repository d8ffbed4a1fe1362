"""The commands of ``t2tvit``, one module each: HELP, EPILOG, ``add_options`` and ``run``.

A module imports the trainer and the like inside ``run``, so that ``--help`` needs no extra package.
"""

COMMANDS = (
    *("train", "eval", "predict", "compare", "bench", "visualize", "export", "convert", "models"),
)
