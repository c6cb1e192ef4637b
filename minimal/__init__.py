# SPDX-License-Identifier: MIT
"""Large models from scratch, one file per idea. Each file stands alone: read it, run it, or copy it."""

__version__ = "0.1.0"
