# Each target makes and fills its own environment (.venv) through install.py.
PYTHON ?= python3

.PHONY: demo test bench bench-quality train lint
demo:
	$(PYTHON) install.py --demo $(ARGS)
test:
	$(PYTHON) install.py --test $(ARGS)
bench:
	$(PYTHON) install.py --bench $(ARGS)
	$(PYTHON) install.py --bench-canvas
bench-quality:
	$(PYTHON) install.py --bench-quality $(ARGS)
train:
	$(PYTHON) install.py --train $(ARGS)
lint:
	$(PYTHON) install.py --lint $(ARGS)
