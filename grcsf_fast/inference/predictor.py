"""A volume in, a lesion mask out: one at a time, many through shared batches, or a folder of files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch import Tensor

from ..data.channels import find_images
from ..data.files import check_writable
from ..data.mask_files import MASK_FORMATS
from ..errors import ArgumentError, ArgumentTypeError
from ..pretrained.bundle import described_kind
from ..runtime.processes import World
from ..runtime.progress import busy, counter
from .case import in_lanes, predict_case
from .folder import predict_cases
from .lanes import Failure, Job
from .model import Model
from .plan import Plan, check_names, plan
from .prediction import Prediction, check_name
from .record import CaseResult
from .share import Share
from .sources import Source, as_source, name_of

__all__ = ["Predictor"]


class Predictor(Model):
    """A bundle ready to segment volumes.

    Args:
        bundle: with a network, or the name of a packaged one, or a bundle's folder; it is copied, not changed.
        device: ``"auto"`` (CUDA where there is one, else the CPU) or any torch device, such as ``"mps"``.
        backend: of the two ops, see :func:`grcsf_fast.use_backend`.
        batch_size: axial slices at once, of several volumes in :meth:`predict_many`; for 3-D networks an eighth of it
            windows.
        progress: show a bar on anything longer than 2 s.
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"`` (not on the CPU) or ``"auto"``: bfloat16 where it is
            faster, see :mod:`grcsf_fast.runtime.precision`, else float32. Differences to the image, probabilities and
            all after are float32.
        importance_threshold: patches that the RCU scores below it are skipped; None: the bundle's.
        compiled: convolutions, norms and activations fused by torch's compiler, a minute for each size of slices when
            first met; kept on disk for later runs.

    Raises:
        ArgumentTypeError: ``bundle`` is something else.
        BundleError: the bundle cannot be read, holds no network, needs an autoencoder and has none, or has networks
            of other channels or labels than it names.
        BackendUnavailableError: the backend was asked for by name and cannot run here.
        ValueError: an argument that does not fit.

    Example:
        >>> predictor = Predictor("demo")  # doctest: +SKIP
        >>> predictor("scan.nii.gz").save("results")  # doctest: +SKIP
        >>> predictor(array, affine=affine).mask  # doctest: +SKIP
        >>> for result in predictor.predict_folder("scans", "results"):  # doctest: +SKIP
        ...     print(result)
    """

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path = "demo", *arguments: Any, **named: Any) -> Predictor:
        """The class under the name that users of other packages look for; the same arguments and errors."""
        return cls(name_or_folder, *arguments, **named)

    def __call__(self, source: Source | np.ndarray, affine: Any = None, name: str | None = None) -> Prediction:
        """Segment one volume, with all threads.

        Args:
            source: path of a volume or of a folder with one DICOM series, a nibabel image, MONAI's ``MetaTensor``, or
                an array or tensor with ``affine`` beside it, (X, Y, Z) or (1, X, Y, Z); any orientation and spacing.
                For a bundle of several channels a list of such files or images, the file of the first beside the
                others as nnU-Net names them, a 4-D file or image, or an array (C, X, Y, Z).
            affine: (4, 4), voxel to RAS mm, of an array or tensor.
            name: of the case, which its files begin with; None: that of the file, also of the one that a nibabel image
                or ``MetaTensor`` was read from, else ``"volume"``.

        Returns:
            The prediction, on the grid of ``source``.

        Raises:
            VolumeError: the volume cannot be used; the message names it.
            ArgumentError: an array without affine, or of a shape that is no volume's; a name that no case can have.
            FileNotFoundError: no such file.
        """
        if name is not None:
            check_name(name)
        work = predict_case(self, as_source(source, affine, self.in_channels), name)
        next(work)  # the room that it asks for: one volume alone has all there is
        order, title = None, "reading"
        with self.on_backend():
            stream = self.stream()
            while True:
                try:
                    with busy(title, self.progress):
                        error = order.error if order is not None else None
                        order = stream.submit(work.send(order) if error is None else work.throw(error))
                except StopIteration as end:
                    return end.value
                with counter("batches", self.progress) as moved:
                    stream.run(moved)
                title = "putting it together"

    def predict_many(
        self,
        sources: Iterable[Source],
        *,
        ordered: bool = True,
        failures: str = "raise",
        lanes: int | None = None,
        memory: int | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Segment many volumes through shared batches; lazy, a few volumes ahead of what is asked for.

        Lanes work side by side: each reads, computes and restores volumes of its own, while the networks' weights are
        shared. A lane computes with one thread, so that no thread waits for another; until the iterator ends or is
        closed, torch is set to one thread in the whole process. Beside a GPU one thread runs the batches of all lanes.

        Args:
            sources: as for a call, without affine; taken one by one when there is room, in a thread of their own.
            ordered: yield in the order of ``sources``; False: as completed.
            failures: ``"raise"`` the error of a volume that cannot be used when its turn comes, or ``"return"`` a
                :class:`Failure` in its place.
            lanes: None: one per thread of torch's, and no more than this process may use cores.
            memory: bytes that the volumes at work may take together; a volume that needs more alone fails. None: most
                of what the machine, and the GPU that is used, have free. Predictions that wait for their turn come on
                top.

        Yields:
            Predictions, or failures. Images that were read from no file are named by their places, ``volume_0`` and so
            on.

        Raises:
            VolumeError: see ``failures``.
            ArgumentError: arguments that do not fit, at once.
            ArgumentTypeError: one source, or a folder, in place of several sources, at once.
            UnfinishedError: what no other volume would survive, such as a GPU that computes nothing any more.
        """
        if failures not in ("raise", "return"):
            raise ArgumentError(f"failures: expected 'raise' or 'return', got {failures!r}")
        alone = isinstance(sources, str | Path | np.ndarray | nib.spatialimages.SpatialImage)
        if alone or not isinstance(sources, Iterable) or (isinstance(sources, Tensor) and sources.dim() < 5):
            raise ArgumentTypeError(
                f"sources: expected several of them, such as sorted(Path('scans').glob('*.nii.gz')), got "
                f"{described_kind(sources)}; predictor(source) segments one, predict_folder(input, output) a folder"
            )
        return self._predicted(sources, ordered, failures, lanes, memory)

    def _predicted(
        self, sources: Iterable[Source], ordered: bool, failures: str, lanes: int | None, memory: int | None
    ) -> Iterator[Prediction | Failure]:
        cases = (
            Job(source, predict_case(self, source, unnamed=f"volume_{place}"), name_of(source, f"volume_{place}"))
            for place, source in enumerate(sources)
        )
        with closing(in_lanes(self, cases, ordered, lanes, memory)) as results:
            for result in results:
                if isinstance(result, Failure) and failures == "raise":
                    raise result.error
                yield result

    def predict_folder(
        self,
        input: str | Path | Plan,
        output: str | Path,
        *,
        overwrite: bool = False,
        maps: bool = True,
        overlay: bool = True,
        page: bool = True,
        memory: int | None = None,
        world: World | None = None,
        mask_format: str = "nifti",
        share: str | None = None,
    ) -> Iterator[CaseResult]:
        """Segment the files of a folder into another one; a bad one is noted and the others are done.

        Lazy: nothing is done before the results are asked for, and cases are done while they are: go through them, or
        write ``list(predictor.predict_folder(...))``. A case whose files are there, of the same input, weights
        and settings, is left as it is. ``summary.csv`` and, if something failed, ``failures.json`` are written at the
        end, also if that comes early.

        Args:
            input: a folder of volumes, one file, or a :class:`Plan` of its cases.
            output: folder for the results, see :meth:`Prediction.save`.
            overwrite: do finished cases again, also in place of results of other inputs of their names.
            maps: with residual maps.
            overlay: with pictures.
            page: with ``index.html``, a page of all cases, at the end of a run that was not interrupted.
            memory: see :meth:`predict_many`.
            world: of this process, where several share the cases.
            mask_format: see :meth:`Prediction.save`.
            share: ``"3/50"``, the third of fifty shares of a folder's cases; None: all. Runs of all shares may write
                to one folder at once; the one that ends last writes the table and the page of all.

        Returns:
            For each case, as completed, :class:`Done`, :class:`Finished` before or :class:`Failed`; in the first
            process of several also the failures of the others.

        Raises:
            FileNotFoundError: no volume in ``input``.
            OSError: ``output`` cannot be written.
            ArgumentError: ``output`` is the folder of the input, a case is named like another's result, or SimpleITK is
                missing for masks in the format of their images.
            UnfinishedError: what no other case would survive, such as a full disk; what is done is on disk.
        """
        if mask_format not in MASK_FORMATS:
            raise ArgumentError(f"mask_format: expected one of {MASK_FORMATS}, got {mask_format!r}")
        if not isinstance(input, Plan):
            cases, problems = find_images(input, self.in_channels)
            check_writable(output)
            check_names(input, output, cases)
            folder = input if Path(input).is_dir() else ""
            part = None if share is None else Share.parse(share)
            input = plan(cases, problems, world or World(), folder, part)
        elif share is not None:
            raise ArgumentError("share: expected it with a folder of volumes; a plan has its own")
        return predict_cases(self, input, output, overwrite, maps, overlay, page, memory, world or World(), mask_format)
