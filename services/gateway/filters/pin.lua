-- A tensor request that names no version, or one by name, gets the one its route says. Runs only on routes whose `pin`
-- says so.

function envoy_on_request(h)
  local suffix = pinned(h)
  if suffix ~= nil and suffix ~= "" then append_to_one(h, suffix) end
end
