"""Moving a model to its devices."""

import torch

from lavis_lite.models.base import BaseModel
from lavis_lite.nn.llm_devices import spread


def place(model: BaseModel, device: str | torch.device) -> BaseModel:
    """Return the model on `device`, its language model on the devices of `llm_device_map`, if it is set.

    Raises:
        InputError, MissingPackageError: as `spread`.
    """
    if not isinstance(model, BaseModel) or model.llm_device_map is None:  # another module has its methods only
        return model.to(device)
    llm = model.get_submodule(f"{model.llm_prefix}_model")
    for child in model.children():
        if child is not llm:
            child.to(device)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    spread(llm, model.llm_device_map)  # now that the other parts have their memory
    return model
