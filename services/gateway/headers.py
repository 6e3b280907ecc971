"""Headers of requests. Those that begin with x- are the gateway's, for the services behind it: none of them
is taken from a client."""

OWN_PREFIX = "x-lingqu-"
CLIENT_HEADER = "x-lingqu-client"
MODEL_HEADER = "x-lingqu-model"
VERSION_HEADER = "x-lingqu-model-version"
# The id of the key, and the models that the key is for if it is not for all that its client may call.
KEY_HEADER = "x-lingqu-key"
KEY_MODELS_HEADER = "x-lingqu-key-models"
# Whom a client certificate names, until it has become CLIENT_HEADER.
CERTIFICATE_HEADER = "x-lingqu-certificate"
# On copies for a shadow version, whose answers nobody sees.
SHADOW_HEADER = "x-lingqu-shadow"
# What a request that may be copied and its copy have in common.
PAIR_HEADER = "x-lingqu-pair"
# The model that answers in place of the one that was asked for; on answers, too.
FALLBACK_HEADER = "x-lingqu-fallback"
# The most urgent class that the client's requests may have.
MAX_PRIORITY_HEADER = "x-lingqu-max-priority"
# Equal for prompts with the same beginning.
PREFIX_HEADER = "x-lingqu-prefix"
# When the limiter has let a request pass, where it tells that.
ADMITTED_HEADER = "x-lingqu-admitted"

# A client's: the number or name of the version it wants, and what its requests have in common.
WANTED_HEADER = "lingqu-version"
SESSION_HEADER = "lingqu-session"
