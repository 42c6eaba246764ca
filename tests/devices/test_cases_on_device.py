"""The named cases whose data may go to a device, on the stand-in device against brute force on the CPU."""

from dataclasses import replace

import pytest
from cases import CASES
from test_cases import Asked

import devices
from devices.fits_on import trainer
from lightning_influence import Attributor

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
# Their modules or batches keep tensors of the CPU that nothing moves: they do not train on a device either.
OWN_TENSORS = (
    "EmbeddingBag with offsets",
    "TransformerEncoder with padding",
    "packed sequences",
    "class weights by hand",
    "class weights of nll_loss",
    "class weights with label smoothing",
    "sequences end to end",
    "labels that are words",
    "a teacher that is no submodule",
    "a mean teacher in a list",
    "an average of the weights that is no module",
    "a running centre in a plain tensor",
    "batches as objects that the step writes into",
    "batches as arrays that the step writes into",
    "one of 80 unlike the others, a rare class of another weight",
)
# What the stand-in device lacks: fused recurrent cells, sparse tensors, other orders in memory.
LACKING = ("LSTM", "GRU", "a net that squeezes inside", "sparse", "channels last")
PLAIN = [
    name
    for name, case in CASES.items()
    if case.expected == "right"
    and case.trainer is None
    and not (case.later or case.files or name.startswith(OWN_TENSORS))
    and not (devices.IS_STANDIN and any(word in name for word in LACKING))
]


# PyTorch's kernel of weight norm takes the square root in float32 on CUDA.
COARSE = ("weight norm", "weight norm as hooks", "weight norm of a convolution")


class OnDevice(Asked):
    """A case whose brute force runs on the CPU and whose attributor computes on the device."""

    @property
    def attributor(self):
        case = self.case
        return Attributor(
            self.asked,
            self.loader,
            self.trajectory,
            trainer(devices.HERE),
            3,
            loss=case.loss,
            parameters=case.parameters,
        )


@pytest.mark.parametrize("name", PLAIN)
def test_a_case_on_the_device_equals_brute_force(name, tmp_path):
    coarse = name in COARSE and not devices.IS_STANDIN
    OnDevice(replace(CASES[name], tolerance=1e-6) if coarse else CASES[name], tmp_path).check()
