# The dashboard, objectives, monitors and log pipeline of the embedding gateway in Datadog. How to apply it: README.md.
# All but this file is JSON, for other ways to get it into Datadog; what is generated comes from deploy/watch.

terraform {
  required_version = ">= 1.5"
  required_providers {
    datadog = {
      source  = "DataDog/datadog"
      version = ">= 3.50"
    }
  }
}

# Reads DD_API_KEY, DD_APP_KEY and DD_HOST (https://api.datadoghq.eu, for example) from the environment.
provider "datadog" {}

variable "env" {
  description = "The environment: the tag `env` of the gateways that are watched. For another one, apply again with another state."
  type        = string
}

variable "docs" {
  description = "The address of the gateway's documentation, where operations.md is."
  type        = string
  default     = "docs"
}

variable "page" {
  description = "Who is woken up, such as @pagerduty-embeddings."
  type        = string
}

variable "ticket" {
  description = "Who gets what can wait for days, such as @slack-embeddings."
  type        = string
}

variable "has_distributions" {
  description = "Whether Datadog has the histograms of the gateway already. It cannot configure metrics that it has never seen: apply first with false, start the gateway, then apply with true."
  type        = bool
  default     = true
}

locals {
  pipeline      = jsondecode(file("${path.module}/log-pipeline.json"))
  distributions = jsondecode(file("${path.module}/distributions.json"))
  objectives = {
    for name in ["availability", "latency"] : name => jsondecode(templatefile("${path.module}/objectives/${name}.json", { env = var.env }))
  }
  texts = {
    env          = var.env
    docs         = var.docs
    page         = var.page
    ticket       = var.ticket
    availability = datadog_service_level_objective.objective["availability"].id
    latency      = datadog_service_level_objective.objective["latency"].id
  }
}

resource "datadog_dashboard_json" "gateway" {
  dashboard = file("${path.module}/dashboard.json")
}

resource "datadog_service_level_objective" "objective" {
  for_each    = local.objectives
  name        = each.value.name
  type        = each.value.type
  description = each.value.description
  tags        = each.value.tags

  query {
    numerator   = each.value.query.numerator
    denominator = each.value.query.denominator
  }

  dynamic "thresholds" {
    for_each = each.value.thresholds
    content {
      timeframe = thresholds.value.timeframe
      target    = thresholds.value.target
    }
  }

  # The objective of latency counts values of a distribution, which needs its percentiles.
  depends_on = [datadog_metric_tag_configuration.distribution]
}

resource "datadog_monitor_json" "monitor" {
  for_each = fileset("${path.module}/monitors", "*.json")
  monitor  = templatefile("${path.module}/monitors/${each.value}", local.texts)
}

# Percentiles, which Datadog computes only for the distributions that ask for them.
resource "datadog_metric_tag_configuration" "distribution" {
  for_each            = var.has_distributions ? local.distributions : {}
  metric_name         = each.key
  metric_type         = "distribution"
  tags                = each.value
  include_percentiles = true
}

resource "datadog_logs_custom_pipeline" "gateway" {
  name       = local.pipeline.name
  is_enabled = local.pipeline.is_enabled

  filter {
    query = local.pipeline.filter.query
  }

  dynamic "processor" {
    for_each = local.pipeline.processors
    content {
      dynamic "attribute_remapper" {
        for_each = processor.value.type == "attribute-remapper" ? [processor.value] : []
        content {
          name                 = attribute_remapper.value.name
          is_enabled           = attribute_remapper.value.is_enabled
          sources              = attribute_remapper.value.sources
          source_type          = attribute_remapper.value.source_type
          target               = attribute_remapper.value.target
          target_type          = attribute_remapper.value.target_type
          preserve_source      = attribute_remapper.value.preserve_source
          override_on_conflict = attribute_remapper.value.override_on_conflict
        }
      }
      dynamic "status_remapper" {
        for_each = processor.value.type == "status-remapper" ? [processor.value] : []
        content {
          name       = status_remapper.value.name
          is_enabled = status_remapper.value.is_enabled
          sources    = status_remapper.value.sources
        }
      }
      dynamic "date_remapper" {
        for_each = processor.value.type == "date-remapper" ? [processor.value] : []
        content {
          name       = date_remapper.value.name
          is_enabled = date_remapper.value.is_enabled
          sources    = date_remapper.value.sources
        }
      }
      dynamic "message_remapper" {
        for_each = processor.value.type == "message-remapper" ? [processor.value] : []
        content {
          name       = message_remapper.value.name
          is_enabled = message_remapper.value.is_enabled
          sources    = message_remapper.value.sources
        }
      }
      dynamic "trace_id_remapper" {
        for_each = processor.value.type == "trace-id-remapper" ? [processor.value] : []
        content {
          name       = trace_id_remapper.value.name
          is_enabled = trace_id_remapper.value.is_enabled
          sources    = trace_id_remapper.value.sources
        }
      }
      dynamic "span_id_remapper" {
        for_each = processor.value.type == "span-id-remapper" ? [processor.value] : []
        content {
          name       = span_id_remapper.value.name
          is_enabled = span_id_remapper.value.is_enabled
          sources    = span_id_remapper.value.sources
        }
      }
      dynamic "arithmetic_processor" {
        for_each = processor.value.type == "arithmetic-processor" ? [processor.value] : []
        content {
          name               = arithmetic_processor.value.name
          is_enabled         = arithmetic_processor.value.is_enabled
          expression         = arithmetic_processor.value.expression
          target             = arithmetic_processor.value.target
          is_replace_missing = arithmetic_processor.value.is_replace_missing
        }
      }
    }
  }
}
