# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnet_fused`` is the command ``resnet-fused``."""

import sys

from resnet_fused.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
