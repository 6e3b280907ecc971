-- Says which model will answer in place of the one that was asked for, so that who may call it is looked at. Runs only
-- on routes to such a model, before access.py and key_models.lua.

function envoy_on_request(h)
  h:headers():replace("x-lingqu-fallback", h:metadata():get("fallback"))
end
