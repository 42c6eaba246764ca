"""The named cases whose data may go to a device, on the stand-in device against brute force on the CPU."""

import pytest
from cases import CASES
from test_cases import Asked

from devices.fits_on import trainer
from lightning_influence import Attributor

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore")]
PLAIN = [
    name
    for name, case in CASES.items()
    if case.expected == "right" and case.trainer is None and not (case.later or case.files)
]


class OnDevice(Asked):
    """A case whose brute force runs on the CPU and whose attributor computes on the device."""

    @property
    def attributor(self):
        case = self.case
        return Attributor(
            self.asked,
            self.loader,
            self.trajectory,
            trainer("standin:0"),
            3,
            loss=case.loss,
            parameters=case.parameters,
        )


@pytest.mark.parametrize("name", PLAIN)
def test_a_case_on_the_device_equals_brute_force(name, tmp_path):
    OnDevice(CASES[name], tmp_path).check()
