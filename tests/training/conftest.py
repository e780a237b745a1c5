"""What tests of training share: an index of made-up stories."""

from pathlib import Path

import pytest

from megazh.training.prepare import prepare


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 200 stories, with a tokenizer of 400 ids."""
    return prepare(tmp_path_factory.mktemp("stories"), 400, 1, None, story_count=200, say=lambda line: None)
