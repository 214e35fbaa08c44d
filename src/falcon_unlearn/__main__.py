"""``python -m falcon_unlearn``."""

from __future__ import annotations

import sys

from falcon_unlearn.cli import main

sys.exit(main())
