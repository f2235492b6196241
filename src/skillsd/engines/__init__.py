"""What an engine is (`engine`), the one in this process (`in_process`) and vLLM servers (`vllm_server`).

This package imports nothing: `vllm_noise` is read in vLLM's own environment, where torch may be the only one of our dependencies.
"""
