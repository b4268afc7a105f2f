"""What tests of encoding share."""

from pathlib import Path

import pytest

# Imports are those of who asks: tests of a GPU run where Pillow and diffusers are not.


@pytest.fixture(scope="session")
def given(tmp_path_factory) -> Path:
    """A folder with ``images`` and ``vae``; tests leave them as they are."""
    from encoding import COUNT
    from pictures import image_folder, tiny_vae

    folder = tmp_path_factory.mktemp("given")
    image_folder(folder / "images", count=COUNT, side=40)
    tiny_vae(folder / "vae", size=32, count=COUNT)
    return folder


@pytest.fixture(scope="session")
def whole(given) -> dict[str, bytes]:
    """The store ``given/whole`` that an undisturbed encoding makes."""
    from encoding import content, encode_given

    encode_given(given, given / "whole")
    assert not list(given.glob(".*"))
    return content(given / "whole")
