-- A stream of tensors is for the one model that its first message names: that was allowed and counted. Any later
-- message may name another, so every name in every message is compared, and one that is another is overwritten
-- with '!' where it stands, which Triton answers as an unknown model. Messages may be split over chunks anywhere.
-- Read as Triton's parser reads: tags of at most five bytes, of which 32 bits count. What it could not read either,
-- and what is compressed, is made unreadable.
--
-- Where the route says `pin`, each gets what its first message needs to be for that version, appended.

local function guarded(name, suffix)
  local head, left = "", 0                   -- of the frame: its prefix, bytes of the message to come
  local step, value, scale, size             -- of the field: what a number means, the number so far
  local skip, naming, seen, wrong, broken    -- bytes to pass, bytes of a name to come and compared

  local function begin()
    step, value, scale, size = "tag", 0, 1, 0
    skip, naming, seen, wrong, broken = 0, 0, 0, false, false
  end

  local function number(byte)
    value, scale, size = value + byte % 128 * scale, scale * 128, size + 1
    if byte >= 128 then
      broken = size >= (step == "number" and 10 or 5)
      return
    end
    local read = value
    value, scale, size = 0, 1, 0
    if step == "name" then
      naming, seen, wrong, step = read, 0, read ~= #name, "tag"
    elseif step == "length" then
      skip, step = read, "tag"
    elseif step == "number" then
      step = "tag"
    else
      local tag = read % 4294967296
      local wire = tag % 8
      if wire == 0 then step = "number"
      elseif wire == 1 then skip = 8
      elseif wire == 2 then step = tag == 10 and "name" or "length"
      elseif wire == 5 then skip = 4
      else broken = wire > 5 end
    end
  end

  -- The chunk with what has to be changed; nil if nothing has.
  return function(bytes)
    local out, kept, at = {}, 1, 1           -- bytes from `kept` to before `at` stay as they are
    local function replace(text, count)
      out[#out + 1] = bytes:sub(kept, at - 1)
      out[#out + 1] = text
      at = at + count
      kept = at
    end
    while at <= #bytes do
      if left == 0 then
        local take = math.min(5 - #head, #bytes - at + 1)
        head = head .. bytes:sub(at, at + take - 1)
        if suffix == "" and head:byte(1) == 0 then at = at + take else replace("", take) end
        if #head == 5 then
          local _, a, b, c, d = head:byte(1, 5)
          left = ((a * 256 + b) * 256 + c) * 256 + d
          if suffix ~= "" or head:byte(1) ~= 0 then out[#out + 1] = prefix(0, left + #suffix) end
          if left == 0 and suffix ~= "" then out[#out + 1] = suffix end
          head = ""
          begin()
        end
      else
        local take = math.min(left, #bytes - at + 1)
        if broken then
          replace(("\255"):rep(take), take)
        elseif naming > 0 then
          take = math.min(take, naming)
          wrong = wrong or bytes:sub(at, at + take - 1) ~= name:sub(seen + 1, seen + take)
          naming, seen = naming - take, seen + take
          if wrong then replace(("!"):rep(take), take) else at = at + take end
        elseif skip > 0 then
          take = math.min(take, skip)
          skip, at = skip - take, at + take
        else
          take = 1
          number(bytes:byte(at))
          at = at + 1
        end
        left = left - take
        if left == 0 and suffix ~= "" then replace(suffix, 0) end
      end
    end
    if #out == 0 then return nil end
    out[#out + 1] = bytes:sub(kept)
    return table.concat(out)
  end
end

function envoy_on_request(h)
  local found = h:streamInfo():dynamicMetadata():get("envoy.filters.http.grpc_field_extraction")
  local name = found["model_name"]
  if type(name) == "table" then name = name[1] end
  local suffix = pinned(h)
  if suffix == nil then return end
  local guard = guarded(name, suffix)
  for chunk in h:bodyChunks() do
    local size = chunk:length()
    local changed = size > 0 and guard(chunk:getBytes(0, size)) or nil
    if changed ~= nil then chunk:setBytes(changed) end
  end
end
