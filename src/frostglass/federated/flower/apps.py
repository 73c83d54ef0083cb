"""The apps that a Flower deployment names: `frostglass.federated.flower.apps:client` and `...:server`.

Both read the run's configuration: "plan", the text of a plan (TOML); "out", the server's run folder; "engine", a word
for the history ("deployment" if absent). A SuperNode's --node-config gives its "partition-id".
"""

from frostglass.federated.flower.client_apps import plan_client_app
from frostglass.federated.flower.server_app import plan_server_app

client = plan_client_app()
server = plan_server_app()
