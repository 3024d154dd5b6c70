"""The OpenAI data plane: finds the model of a request and relays it to one of its engines."""

from modelfleet_serving.router_native import use

use(__path__, __name__)
