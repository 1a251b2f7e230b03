"""Programs that train, from raw text to adapters: `python -m train --help`."""
