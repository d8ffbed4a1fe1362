"""The commands of ``t2tvit``, one module each: HELP, EPILOG, ``add_options`` and ``run``.

Each module imports heavy dependencies inside ``run``, so that ``--help`` needs no extra packages.
"""

COMMANDS = (
    *("train", "eval", "predict", "compare", "bench", "visualize", "export", "convert", "models"),
)
