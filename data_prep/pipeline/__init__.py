"""The curation engine: a raw pool of pairs -> measured columns -> decisions -> training shards.

`curation.py` holds the configuration and shows a run from top to bottom. Its stages, in order:

- `pool.py`: lists and reads the pairs of tars, parquet files and folders.
- `measuring.py`: runs the steps' `measure` over parts of the pool, and stores the columns.
- `merging.py`: merges the parts into one set, sorted by id, and runs the steps' `merge`.
- `canaries.py`: plants edited copies to measure how many near duplicates are found.
- `deciding.py`: asks the steps in turn which pairs to drop; `ledger.py` stores and explains the decisions.
- `writing.py`: writes the kept pairs into shards.

`workers.py` spreads the work over processes; `forecast.py` tells what other thresholds would keep.
"""
