"""Programs that train; today only the quickstart's model: `python -m train.quickstart --help`."""
