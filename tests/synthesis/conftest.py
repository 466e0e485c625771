"""The template at 4 mm."""

import pytest

from grcsf_fast.synthesis.template import Template, load_template


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(4.0)
