.DEFAULT_GOAL := help
.PHONY: help demo traces plans serve gpu test slow full-size attack lint format docs benchmark serving quality train clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: ## Build the demo bundle and restore the sample photo
	python export/build_engines.py
	python -m engine.restore tests/data/coffee-damaged.jpg -o restored.png --overwrite

traces: ## Make the traced graphs that ship again, where code that decides them has changed (SDXL: half an hour)
	python -m export.graphs.make_traces
	python -m export.graphs.make_traces tests/data/traces/reference

plans: ## Compile the demo for RTX cards; needs no GPU
	python export/build_engines.py --backend tensorrt-rtx --output demo-plans

serve: ## Serve the default bundle until Ctrl-C
	python triton_repo/serve.py

gpu: ## Run what only a GPU can show, and keep the numbers in benchmarks/results
	python benchmarks/gpu_session.py

# A worker for each core, but few, as each takes 1 GB; one file's tests share what is made for them.
# pytest-timeout cannot end a test that waits in native code: faulthandler prints its stacks and ends its worker.
test: ## Run the tests (about 9 minutes on 2 cores)
	python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		-o faulthandler_timeout=1000 -o faulthandler_exit_on_timeout=true

slow: ## Run all tests, those that take minutes included
	python -m pytest --slow

attack: ## Fuzz every reader of foreign bytes: 200,000 inputs, about half an hour
	python export/build_engines.py --output build/attacked
	python tests/attacks/harness.py build/attacked --inputs 200000

full-size: ## Check everything at SDXL's size: an hour, 24 GB of memory, 40 GB of disk
	python -m pytest tests/full_size --full-size -s

lint: ## Check style, types and the direction of imports
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: ## Bring the code into style
	ruff check --fix .
	ruff format .

docs: ## Write the pages of --help again, and build the documentation into build/site
	python docs/make_help.py
	mkdocs build --strict

benchmark: ## Measure a restoration by stage, against the floor and eager PyTorch
	python benchmarks/latency.py --baseline torch --size 256 512

serving: ## Measure serving: one client against the direct call, closed loops, batching on and off
	python benchmarks/serving.py

quality: ## Judge the default bundle on photos, as the paper's Table 1
	python benchmarks/quality.py --sheet quality.png

train: ## Train the demo's networks (hours on a CPU); goes on where it was stopped
	python -m export.demo.train

clean: ## Remove what tools left behind; bundles and caches stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
