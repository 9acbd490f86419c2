"""`python -m gptjax` is the command `gptjax`."""

import sys

from gptjax.cli.main import main

sys.exit(main())
