"""Parts of the router's pure policies; their doors are the modules beside this package."""
