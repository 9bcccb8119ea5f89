"""The dictionaries of the test hub are read by SAELens itself as their records say."""

from __future__ import annotations

import warnings

import pytest
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

from tests.support.hub import hub_here, running_hub
from tests.support.hub_dictionaries import DICTIONARIES, registered, save_dictionaries


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub, hub_here(hub, folder / "cache"), registered():
        save_dictionaries(hub, folder / "files")
        yield hub


def test_there_is_one_of_each_loader():
    assert {one.loader_name for one in DICTIONARIES} == set(NAMED_PRETRAINED_SAE_LOADERS)
    assert len({one.name for one in DICTIONARIES}) == len(DICTIONARIES)


@pytest.mark.parametrize("one", DICTIONARIES, ids=lambda one: one.name)
def test_saelens_reads_a_dictionary_as_its_record_says(one, here):
    if one.loader_name == "sparsify":
        pytest.skip("SAELens does not fetch its cfg.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = SAE.from_pretrained(one.release, one.id, device="cpu", dtype="float32")
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out or "") == (one.hook_name, one.hook_name_out)
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (one.d_in, one.d_sae)
    assert sae.W_dec.shape[0] == one.d_sae
