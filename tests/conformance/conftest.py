MARKERS = """
    accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test is_fsdp_test is_tensor_parallel_test
    is_training_test order torch_compile_test
"""


def pytest_configure(config):
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: used by Transformers' own suite")
