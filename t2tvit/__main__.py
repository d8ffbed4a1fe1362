"""``python -m t2tvit``."""

import sys

from t2tvit.cli import main

sys.exit(main())
