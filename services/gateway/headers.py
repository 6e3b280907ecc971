"""Headers that the gateway sets for the services behind it; none of them is taken from a client."""

CLIENT_HEADER = "x-lingqu-client"
MODEL_HEADER = "x-lingqu-model"
VERSION_HEADER = "x-lingqu-model-version"
# The id of the key, and the models that the key is for if it is not for all that its client may call.
KEY_HEADER = "x-lingqu-key"
KEY_MODELS_HEADER = "x-lingqu-key-models"
OWN_HEADERS = (CLIENT_HEADER, MODEL_HEADER, VERSION_HEADER, KEY_HEADER, KEY_MODELS_HEADER)
