"""Lightning on the stand-in device."""

import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import SingleDeviceStrategy

import devices


class StandinAccelerator(Accelerator):
    """What Lightning needs to know of a device."""

    def setup_device(self, device):
        torch.standin.set_device(device)

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(asked):
        return asked

    @staticmethod
    def get_parallel_devices(asked):
        return [torch.device(f"{devices.NAME}:0")]

    @staticmethod
    def auto_device_count():
        return devices.DEVICES

    @staticmethod
    def is_available():
        return True

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def name():
        return devices.NAME


def on(device):
    """Options of a Trainer that computes on one device."""
    kind, _, index = device.partition(":")
    if kind != devices.NAME:
        return {"accelerator": kind, "devices": [int(index)] if index else 1}
    devices.load()
    return {
        "accelerator": StandinAccelerator(),
        "strategy": SingleDeviceStrategy(device=torch.device(device)),
        "devices": 1,
    }
