import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Everything here is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A folder in the layout of the published Wan 2.1 repository."""
    from written import wan_folder

    return wan_folder(tmp_path_factory.mktemp("hub") / "Wan2.1-T2V-1.3B")
