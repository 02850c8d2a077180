"""The tools: thin command lines over mocte_ds, each with --help; `mocte-ds TOOL` starts them where it is installed."""
