.DEFAULT_GOAL := help
.PHONY: help servers stop

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

servers: ## Start the private PostgreSQL and RabbitMQ (installing what is missing); .local/env says where they are
	@deploy/local/install run
	@deploy/local/servers up
	@deploy/local/servers status

stop: ## Stop everything
	@deploy/local/servers down
