"""Names that are as long as file systems take them."""

from grcsf_fast.data.files import replace_when_done


def test_names_as_long_as_they_can_be(tmp_path):
    """What is written has a name that is not longer; both files of a pair have one, as nibabel writes them together."""
    names = ["x" * (255 - len(ending)) + ending for ending in (".nii.gz", ".hdr", ".img")]
    with replace_when_done(*(tmp_path / name for name in names)) as parts:
        for part in parts:
            part.write_text("")
        assert [part.name.endswith(ending) for part, ending in zip(parts, (".nii.gz", ".hdr", ".img"), strict=True)]
        assert parts[1].stem == parts[2].stem
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
