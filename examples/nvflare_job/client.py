"""A client of the NVFlare example: Frostglass's local training; sends the difference of weights."""

from __future__ import annotations

import nvflare.client as flare
import torch
from task import Net, accuracy, digits, plan

from frostglass.federated.local_client import LocalClient
from frostglass.federated.nvflare.wire import fitted


def main() -> None:
    """Trains in every round that the server calls."""
    torch.set_num_threads(1)
    flare.init()
    site = flare.get_site_name()
    model, (images, labels), test = Net(), digits(site), digits("test")
    client = LocalClient(site, model, images, labels, 10, plan(), seed=0)
    while flare.is_running():
        got = flare.receive()
        state = fitted(got.params, model)
        model.load_state_dict(state)
        done = client.train(state, got.current_round)
        flare.send(
            flare.FLModel(
                params={n: t - state[n] for n, t in done.state.items()},
                params_type=flare.ParamsType.DIFF,
                metrics={"accuracy": accuracy(model, *test)},
                meta={"NUM_STEPS_CURRENT_ROUND": plan().steps_for(len(images)), "examples": done.examples},
            )
        )


if __name__ == "__main__":
    main()
