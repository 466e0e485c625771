"""Train GRCSF in a MONAI loop: their data, transforms, loader and inferer; our network and loss.

By default on a few synthetic images, in seconds: ``python examples/monai_training.py``. Your own images go into
``cases``: a dictionary each, of an image and its lesion mask, or of their paths with ``LoadImaged`` as first transform.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.transforms import Compose, NormalizeIntensityd, RandCropByPosNegLabeld, RandFlipd, ToTensord

from grcsf_fast import GRCSF, GRCSFLoss


def synthetic_cases(count: int) -> list[dict[str, torch.Tensor]]:
    """Noise with a brighter disc in it: image and mask (1, 96, 96) each."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for _ in range(count):
        row, column, radius = (torch.rand(3, generator=generator) * torch.tensor([60.0, 60.0, 8.0])).tolist()
        x, y = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
        mask = ((x - row - 18) ** 2 + (y - column - 18) ** 2 < (radius + 6) ** 2).float()[None]
        cases.append({"image": torch.randn(1, 96, 96, generator=generator) + 2 * mask, "mask": mask})
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/monai"), help="folder of the trained network")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)

    cases = synthetic_cases(12)
    transform = Compose(
        [
            NormalizeIntensityd("image"),
            RandCropByPosNegLabeld(["image", "mask"], label_key="mask", spatial_size=(64, 64), num_samples=2),
            RandFlipd(["image", "mask"], prob=0.5, spatial_axis=0),
            ToTensord(["image", "mask"], track_meta=False),
        ]
    )
    loader = DataLoader(Dataset(cases[:8], transform), batch_size=4, shuffle=True)
    network = GRCSF(spatial_dims=2, in_channels=1, out_channels=1, features=(16, 32, 64, 64), patch_size=4)
    criterion = GRCSFLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)

    for epoch in range(options.epochs):
        network.train()
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            # With residual maps: network(image, residual_maps, return_maps=True).
            loss = criterion(network(batch["image"], return_maps=True), batch["mask"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", flush=True)

    network.eval()
    dice = DiceMetric()
    with torch.no_grad():
        for case in Dataset(cases[8:], NormalizeIntensityd("image")):
            logits = sliding_window_inference(case["image"][None], (64, 64), 4, network, overlap=0.25)
            dice((logits > 0).float(), case["mask"][None])
    print(f"Dice of held-out images: {dice.aggregate().item():.3f}")
    print(f"saved to {network.save_pretrained(options.output)}; GRCSF.from_pretrained loads it")


if __name__ == "__main__":
    main()
