"""Parts of the router's pure policies; their doors are the modules beside this package."""

from modelfleet_serving.router_native import use

use(__path__, __name__)
