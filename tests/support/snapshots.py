"""What a module tree holds, and where the global generators are, for comparison before and after."""

import random

import numpy as np
import torch


def of_tree(module):
    """Every module, parameter, buffer, instance attribute and hook of a tree: {place: the object itself}."""
    found = {}
    for name, part in module.named_modules():
        found[f"{name}: module"] = part
        found[f"{name}: type"] = type(part)
        for attribute, value in vars(part).items():
            place = f"{name}: {attribute}"
            if isinstance(value, dict):
                found[place] = tuple(value)
                found.update({f"{place}[{key}]": item for key, item in value.items()})
            else:
                found[place] = value
    found["state_dict"] = tuple(module.state_dict())
    return found


def differences(before, after):
    """The places whose objects are not the same ones any more."""
    return sorted(
        place
        for place in {*before, *after}
        if place not in before or place not in after or not _same(before[place], after[place])
    )


def _same(left, right):
    return left is right or (isinstance(left, (tuple, int, float, str)) and left == right)


def of_generators():
    """The states of torch's, numpy's and Python's global generators, as comparable bytes."""
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()
