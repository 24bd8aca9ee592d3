"""How many bits each layer gets: sensitivity, costs, allocation under budgets, and the search while training."""
