"""The files of this folder travel to the Hub beside the weights, flat: they import each other as `.sibling` and nothing
else of the package."""
