"""Compares a model on a device with the same model on the host, before anything is read there.

Only MPS is checked: by the versions of torch and of macOS some of its operations have been wrong without an
error. Knows no engine and no SAE.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import torch

from daemon.devices import exact_device, on_exact_device
from daemon.errors import ConfigError
from daemon.model.failures import sense
from daemon.model.loading import LoadedModel
from daemon.model.plain_hooks import PlainHooks
from daemon.model.plain_trace import Unreachable
from daemon.model.probe import Difference, random_ids

TOKENS = 48  # of the text; few, for hosts multiply slowly in bfloat16
WORST = 1e-3  # of a float32 model's tokens: two processors sum up in other orders
RUN_ERRORS = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)

log = structlog.get_logger()


def check_device(model: LoadedModel, hook_names: Sequence[str]) -> None:
    """Raises ConfigError where the model's device does not run it, or gives other values than the host.

    Says nothing of places that plain modules can't tell: the padded engine refuses those.
    """
    if exact_device(model.device) == model.device:
        return
    name, device = model.location.name, model.device
    text = random_ids(model.vocabulary, TOKENS)[: model.context]
    try:
        with on_exact_device(model.model, device):
            expected = PlainHooks(model.model, hook_names, model.vocabulary).read(text)
    except (Unreachable, *RUN_ERRORS):
        return
    try:
        got = PlainHooks(model.model, hook_names, model.vocabulary).read(text)
    except (Unreachable, *RUN_ERRORS) as error:
        raise ConfigError(
            f"model {name}: can't be run on {device} ({type(error).__name__}: {sense(error)}):"
            " set model.device to cpu"
        ) from error
    for hook_name, values in expected.items():
        difference = Difference.of(values, got[hook_name])
        log.debug("device.probe", hook_name=hook_name, worst=difference.worst, median=difference.median)
        same = difference.worst <= WORST if model.dtype == torch.float32 else difference.within(model.dtype)
        if not same:
            raise ConfigError(
                f"model {name}: at {hook_name} {device} gives other values than the host, different by"
                f" {difference}: use another version of torch, or set model.device to cpu"
            )
