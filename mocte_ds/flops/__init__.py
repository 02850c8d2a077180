"""How many FLOPs a run spends, and which share of the peak of its devices that is."""
