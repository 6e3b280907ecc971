"""Headers that the gateway sets for the services behind it; none of them is taken from a client."""

CLIENT_HEADER = "x-lingqu-client"
MODEL_HEADER = "x-lingqu-model"
VERSION_HEADER = "x-lingqu-model-version"
